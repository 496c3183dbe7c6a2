"""Base recipe: a small GPT-2 trained on the source of Python's standard library, in minutes on two CPU cores.

Every key of a run is here, with its meaning and unit. Other recipes start from this one and set only what differs.
`None` means that the value follows from other keys, as the comment says. Any key can be set on the command line:
`--config.model.layers=6`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # seed of every random stream of a run: parameters, batches, dropout, samples
    config.init_from = ""  # run directory, or hf:FOLDER or hf:NAME, to initialize model, parameters and tokenizer from

    config.model = model = ConfigDict()
    model.arch = "gpt"  # gpt or recurrent (decoders), encoder (BERT) or seq2seq (encoder-decoder)
    model.layers = 4  # number of blocks; seq2seq: of the decoder
    model.encoder_layers = placeholder(int)  # seq2seq: number of encoder blocks; None: same as layers
    model.encoder = "transformer"  # seq2seq: type of the encoder: transformer, rnn, gru or lstm
    model.decoder = "transformer"  # seq2seq: type of the decoder, independent of the encoder's: transformer, rnn, gru
    # or lstm
    model.cell = "lstm"  # arch=recurrent: rnn, gru or lstm
    model.bidirectional = True  # recurrent encoder: reads the source in both directions; its output has 2 x width
    # columns
    model.attention = "additive"  # recurrent decoder of seq2seq: additive (Bahdanau) or multiplicative (Luong)
    model.start = placeholder(int)  # seq2seq: id of the decoder start token; None: the tokenizer's end of text
    model.forced_first = placeholder(int)  # seq2seq: id that is always decoded first, as in BART; None: no such token
    model.heads = 4  # number of query heads
    model.kv_heads = placeholder(int)  # number of key/value heads, a divisor of heads; None: same as heads
    model.head_width = placeholder(int)  # size of a head; None: width / heads
    model.width = 128  # size of the residual stream
    model.mlp_width = placeholder(int)  # hidden size of the MLP; None: 4 x width, or 8/3 x width if the activation is
    # gated
    model.context = 128  # maximum number of tokens that a position attends to, including itself
    model.vocabulary = placeholder(int)  # rows of the token embedding; None: the size of the tokenizer's vocabulary

    model.embedding_scale = 1.0  # factor applied to the token embeddings; arXiv 1706.03762: sqrt(width)
    model.embedding_norm = False  # normalize the embeddings (tokens and positions) before the first block
    model.types = 0  # encoder: number of token types, such as BERT's two segments; 0: no type embedding
    model.positions = "learned"  # learned, sinusoidal, sinusoidal_halves, rotary, alibi, relative (T5) or none
    model.relative = relative = ConfigDict()
    relative.buckets = 32  # positions=relative: number of buckets of distances
    relative.longest = 128  # positions=relative: distance in tokens from which on all share the last bucket
    model.rotary = rotary = ConfigDict()
    rotary.theta = 10000.0  # base of the rotary frequencies; the longest wavelength is about 2 pi theta tokens
    rotary.scaling = "none"  # context extension: none, linear or llama3
    rotary.factor = 8.0  # linear and llama3: ratio of the extended context to original_context
    rotary.low_frequency_factor = 1.0  # llama3: frequencies with fewer periods than this in original_context are scaled
    rotary.high_frequency_factor = 4.0  # llama3: frequencies with more periods than this in original_context are kept
    rotary.original_context = 8192  # llama3: context in tokens before the extension

    model.windows = (0,)  # sliding window of each layer in tokens, including the token itself, repeated over the
    # layers; 0: full
    model.attention_scale = placeholder(float)  # factor of the query-key products; None: 1 / sqrt(head_width)
    model.qk_norm = False  # RMSNorm of each head's queries and keys
    model.value_residual = False  # mix each layer's values with those of the first layer by a learned factor
    model.norm = "layernorm"  # layernorm or rmsnorm
    model.norm_position = "pre"  # pre: x + f(norm(x)), with a norm before the head; post: norm(x + f(x))
    model.norm_epsilon = 1e-5  # added to the variance or the mean square
    model.activation = "gelu_tanh"  # gelu, gelu_tanh, relu, relu2, silu; gated: swiglu, geglu, geglu_tanh
    model.mlp = "dense"  # dense, or experts (mixture of experts)
    model.experts = 8  # number of experts
    model.experts_per_token = 2  # number of experts that a token is routed to
    model.load_balance_loss = 0.01  # weight of the load-balancing loss
    model.router_z_loss = 0.001  # weight of the z-loss of the router's logits
    model.use_bias = False  # biases in linear layers and layer norms
    model.qkv_bias = placeholder(bool)  # biases in the query, key and value projections; None: same as use_bias
    model.tied_head = True  # use the token embedding as the output projection
    model.head_bias = False  # add a bias to the logits
    model.suppress_tokens = ()  # with head_bias: ids that are never decoded, such as Marian's padding
    model.head_transform = False  # encoder: add a linear layer, an activation and a norm before the head, as in BERT
    model.logit_scale = 1.0  # factor applied to the input of the head; T5 with a tied head: width ** -0.5
    model.logit_softcap = 0.0  # cap logits with this times tanh(logits / this); 0: no cap
    model.mtp_depth = 0  # number of multi-token prediction heads, of one block each, for train.objective=multi_token
    model.task = "none"  # additional head: none, classification, tagging, span, choice, regression or embedding
    model.labels = 2  # classification and tagging: number of labels
    model.pooling = "last"  # pooling of task heads: first, last, mean or pooler (BERT's)
    model.init_std = 0.02  # standard deviation of initial embeddings and matrices; recurrent: of embeddings only, where
    # 0.1 is better
    model.parametrization = "standard"  # standard or mup, which keeps hyperparameters tuned at base_width valid at any
    # width (arXiv 2203.03466)
    model.base_width = placeholder(int)  # mup: width at which the learning rate was tuned
    model.base_head_width = placeholder(int)  # mup: head_width at which it was tuned; the same as head_width if heads
    # are added instead
    model.base_layers = placeholder(int)  # layers at which it was tuned: scales residual branches by sqrt(base_layers /
    # layers); None: no scaling
    model.residual_init = "scaled"  # initialization of matrices that write to the residual stream: plain, scaled
    # (1/sqrt(2L)) or zero
    model.dropout = 0.0  # dropout rate of embeddings, attention weights and residual branches

    model.scan_layers = False  # scan one compiled block over stacked parameters: compiles faster, runs slower on CPU
    model.kernels = "auto"  # auto (by platform), cpu, gpu, tpu or plain, the reference implementation of the others
    model.remat = "none"  # rematerialization: none, dots (recompute all but matrix products) or full

    config.data = data = ConfigDict()
    data.source = "stdlib"  # key of gptjax.data.sources.SOURCES: Python's standard library, or "text", which data.path
    # sets
    data.path = ""  # file, directory of .txt files, glob, http(s) address or prepared data set
    data.mixture = ()  # instead of path: prepared sets and their weights, ((path, weight), ...); None: their number of
    # tokens
    data.temperature = 1.0  # mixture: weights are raised to 1 / temperature; above 1 they are more even
    data.sha256 = ""  # expected hash of the file at an http(s) address; "": not checked
    data.held_out = 0.05  # validation fraction, by the hash of file names; with few files the end of the text
    data.tokenizer = "bpe:4096"  # bytes, chars, bpe:N (trained on the text) or a tiktoken name; a prepared set has its
    # own
    data.layout = "flat"  # flat (windows of the token stream), packed (whole documents), examples (one document a row)
    # or pairs (encoder-decoder: prompts as sources and completions as targets)
    data.languages = ()  # parallel text at data.path: source and target, such as ("en", "de"), as in the file names
    data.columns = (0, 1)  # parallel text in one table without a header: indices of the source and target columns
    data.examples = examples = ConfigDict()  # records with fields at data.path: .jsonl, .json, .csv, .tsv or .parquet,
    # or a directory with train, val (dev) and test
    examples.form = ""  # text, instructions (Alpaca) or chat; for task heads: classes, values, choices, tags or spans
    examples.template = "{text}"  # input text, with the fields of the record in braces
    examples.second = ""  # template of a second input text; spans: of the text that contains the answer
    examples.answer = "{label}"  # text: template of the completion to learn; "": learn the template; spans: template of
    # the answer
    examples.label = "label"  # field of the class, value, tags or correct choice; spans: of the answer's start
    examples.labels = ()  # classes and tags: label names in the data, model.labels of them, in the order of the head
    examples.choices = "choices"  # field of the list of choices
    examples.fields = ()  # column names of a .csv or .tsv file without a header
    examples.chat_template = "plain"  # chat: plain, chatml, llama3 or the path of a Jinja template
    examples.too_long = "cut"  # examples longer than data.context: cut, leave_out or refuse; their number is reported
    examples.balanced = False  # weight labels equally, whatever their number of examples
    examples.shots = 0  # number of training examples per label, or in total if there are no labels; 0: all
    examples.shot_seed = 0  # seed of the choice of shots
    data.seed = placeholder(int)  # seed of the order and the random choices of batches; None: same as config.seed
    data.batch_size = 16  # sequences per optimizer step over all devices
    data.context = placeholder(int)  # tokens per sequence, at most model.context; None: same as model.context
    data.augment = augment = ConfigDict()  # fractions of training tokens that are changed, sampled anew each epoch
    # (arXiv 1901.11196)
    augment.insert = 0.0  # followed by a random token of the data set
    augment.delete = 0.0  # deleted
    augment.swap = 0.0  # swapped with another token
    augment.replace = 0.0  # replaced by a random token of the data set
    data.prefetch = 2  # batches prepared ahead in threads; 0: none
    data.stages = ()  # curriculum before batch_size and context apply: ((steps, batch_size, context), ...)

    config.finetune = finetune = ConfigDict()  # fine-tuning of the model in init_from
    finetune.method = "full"  # full, rule, top, bitfit, lora, dora, adalora, ia3, adapter, prefix or prompt
    finetune.rule = ""  # rule: regular expression of the paths of trainable parameters
    finetune.also = ""  # regular expression of the paths of parameters trained in addition, with any method
    finetune.top_layers = 2  # top: number of last blocks to train, together with everything after them
    finetune.targets = "."  # lora, dora, adalora: regular expression of the modules to adapt
    finetune.rank = 8  # lora, dora: rank; adalora: mean rank at the end of training
    finetune.alpha = 16.0  # lora, dora, adalora: the update is scaled by alpha / rank
    finetune.rank_stabilised = False  # scale by alpha / sqrt(rank) instead (rsLoRA)
    finetune.dropout = 0.0  # lora, dora, adalora: dropout rate of the input of the update
    finetune.b_rate = 1.0  # lora, dora: learning rate of B relative to A (LoRA+)
    finetune.adalora = adalora = ConfigDict()
    adalora.first_rank = 12  # initial rank of each matrix
    adalora.warmup_steps = 100  # steps before the first ranks are pruned
    adalora.final_steps = 200  # steps at the end with fixed ranks
    adalora.every_steps = 10  # steps between rank allocations
    adalora.orthogonality = 0.1  # weight of the penalty that keeps P and Q orthogonal
    adalora.beta1 = 0.85  # decay of the running mean of sensitivities, per step
    adalora.beta2 = 0.85  # decay of the running mean of their uncertainties, per step
    finetune.bottleneck = 16  # adapter: bottleneck size
    finetune.parallel = False  # adapter: in parallel with a sublayer instead of after it
    finetune.quantise = "none"  # storage of the frozen matrices of the base: none, int8 or nf4
    finetune.length = 16  # prefix: number of key/value pairs per layer; prompt: number of embeddings
    finetune.layer_decay = 1.0  # layer-wise learning rate decay: factor from a block to the one before it; embeddings
    # get the least
    finetune.rates = ()  # ((regular expression of paths, factor of the learning rate), ...); the first match applies
    finetune.unfreeze_every = 0  # steps between unfreezing one more block, from the last one down; 0: all from the
    # start
    finetune.l2_to_start = 0.0  # weight of half the squared distance to the initial parameters, added to the loss
    finetune.ewc = 0.0  # elastic weight consolidation: as l2_to_start, weighted by the Fisher information on the text
    # of init_from
    finetune.fisher_rows = 256  # ewc: rows of that text used to estimate the Fisher information

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"  # adamw, muon, lion, adafactor (uses no beta and no epsilon), sophia or schedule_free
    optimizer.learning_rate = 6e-3  # peak learning rate; adafactor: relative to the parameter's root mean square
    optimizer.weight_decay = 0.1  # decoupled weight decay, times the learning rate, of matrices only
    optimizer.beta1 = 0.9  # decay of the first moment, per step; lion, schedule_free: interpolation weight
    optimizer.beta2 = 0.95  # decay of the second moment, per step; lion: of the momentum; sophia: of the Hessian
    optimizer.epsilon = 1e-8  # added to the root of the second moment; sophia: lower bound of the denominator
    optimizer.momentum = 0.95  # muon: decay of the momentum of hidden matrices, per step
    optimizer.adam_learning_rate = placeholder(float)  # muon: peak learning rate of parameters other than hidden
    # matrices; None: same as learning_rate
    optimizer.gamma = 0.01  # sophia: factor of the Hessian in the denominator; the lower, the more updates are clipped
    optimizer.hessian_every_steps = 10  # sophia: steps between estimates of the Hessian's diagonal
    optimizer.clip_norm = 1.0  # maximum global norm of the gradient; 0: no clipping
    optimizer.ema = 0.0  # decay per step of the moving average of the parameters that is used in their place; 0: none

    config.schedule = schedule = ConfigDict()
    schedule.name = "cosine"  # cosine, linear, wsd (warmup-stable-decay), inverse_sqrt or constant (for schedule_free)
    schedule.warmup_steps = 100  # steps of linear warmup from zero to the peak
    schedule.decay_steps = placeholder(int)  # step at which cosine, linear and wsd reach the end of their decay; None:
    # train.steps
    schedule.final_fraction = 0.1  # learning rate at the end of the decay, as a fraction of the peak
    schedule.cooldown_fraction = 0.2  # wsd: fraction of decay_steps spent decaying

    config.objective = objective = ConfigDict()  # options of the objectives named in train.objective
    objective.label_smoothing = 0.0  # probability mass spread evenly over all tokens or labels
    objective.z_loss = 0.0  # weight of log(sum(exp(logits)))^2 per predicted token; arXiv 2204.02311: 1e-4
    objective.mask_rate = 0.15  # masked, denoising: fraction of tokens masked; BART: 0.3
    objective.masking = "token"  # masked: unit of masking: token, word or span (1 to 10 words)
    objective.corruption = "spans"  # denoising: spans (T5, one sentinel per span) or infilling (BART, one mask per
    # span)
    objective.mean_span = 3.0  # denoising: mean length of a masked span in tokens
    objective.permute_sentences = False  # infilling: shuffle the sentences of the source
    objective.fim_rate = 0.5  # fim: fraction of documents rearranged for fill-in-the-middle
    objective.fim_spm = 0.5  # fim: fraction of these in SPM order (suffix first); the rest is in PSM order
    objective.temperature = 0.05  # contrastive: temperature of the cosine similarities
    objective.teacher = ""  # distillation: run directory of the teacher
    objective.teacher_temperature = 2.0  # distillation: temperature of both models' logits
    objective.teacher_share = 0.5  # distillation: weight of the teacher's loss; the rest is the data's
    objective.adversarial = "none"  # adversarial training of the embeddings: none, fgm (one step) or pgd
    objective.epsilon = 1.0  # fgm, pgd: norm of a row's perturbation
    objective.adversarial_steps = 3  # pgd: number of gradient ascent steps, each of size 2.5 epsilon / steps

    config.train = train = ConfigDict()
    train.objective = "causal"  # key of gptjax.objectives.OBJECTIVES, or a weighted sum: "masked + 0.5*next_sentence"
    train.steps = 1100  # optimizer steps
    train.grad_accumulation = 1  # slices of a batch whose gradients are accumulated before the update
    train.hang_minutes = 30.0  # minutes without progress after which the process exits, to be restarted; 0: never
    train.dtype = "float32"  # compute dtype, float32 or bfloat16; parameters are always float32

    config.mesh = mesh = ConfigDict()
    # Devices along each axis; one of them may be -1: all that the other axes leave.
    mesh.data = -1  # data parallelism: splits the rows of a batch
    mesh.fsdp = 1  # fully sharded data parallelism: splits rows, parameters, gradients and optimizer state
    mesh.tensor = 1  # tensor parallelism: splits attention heads, MLP columns and the vocabulary
    mesh.context = 1  # context parallelism: splits the tokens of a sequence
    mesh.expert = 1  # expert parallelism: splits rows and the experts of a mixture

    config.eval = evaluation = ConfigDict()
    evaluation.every_steps = 110  # steps between evaluations on a fixed validation sample
    evaluation.batches = 8  # batches in that sample; the end of a run evaluates all held-out text

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 275  # steps between checkpoints; 0: none by steps; the last step is always saved
    checkpoint.every_minutes = 0.0  # maximum minutes between checkpoints; 0: none by time
    checkpoint.keep = 2  # newest checkpoints kept
    checkpoint.keep_every = 0  # steps between checkpoints that are kept permanently; 0: none
    checkpoint.keep_best = 0  # checkpoints kept with the lowest validation loss; 0: none

    config.guard = guard = ConfigDict()  # skips the update of bad steps: a loss or gradient that is not finite, or a
    # spike
    guard.spike_z = 0.0  # a loss or gradient norm this many standard deviations above its mean is a spike; 0: no
    # detection
    guard.warmup_steps = 100  # steps before spikes are detected; the mean and deviation cover about 128 steps
    guard.patience = 5  # consecutive bad steps before a run returns to a checkpoint; the second time it stops

    config.log = log = ConfigDict()
    log.every_steps = 10  # steps between lines of metrics.jsonl
    log.statistics = 0  # steps between norms of parameters and updates by group in metrics.jsonl; 0: none
    log.writers = ()  # additional writers: "tensorboard", "wandb"
    log.profile_steps = ()  # first and last step to trace into the run's profile/, such as (10, 13); (): none

    config.sample = sample = ConfigDict()
    sample.prompt = "def read(self"  # prompt of the sample at the end of a run
    sample.max_tokens = 200  # tokens to generate
    sample.temperature = 0.8  # sampling temperature; 0: greedy
    sample.top_k = 50  # sample among the k most likely tokens; 0: all
    return config
