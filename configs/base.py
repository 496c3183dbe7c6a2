"""The base recipe: a small GPT-2 on the running Python's own standard library source; minutes on two CPU cores.

Every key that a run can have is here, with its meaning and unit. Other recipes start from this one and say only
what differs. `None` means "follows from other keys", as the comment says. Any key can be set on the command line:
`--config.model.layers=6`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # every random stream of a run (parameters, batches, dropout, samples) derives from this one
    config.init_from = ""  # a run's directory, or hf:FOLDER, whose model, parameters and tokenizer this run starts with

    config.model = model = ConfigDict()
    model.arch = "gpt"  # gpt or recurrent (decoders), encoder (as BERT), seq2seq (encoder and decoder)
    model.layers = 4  # blocks; of seq2seq the decoder's
    model.encoder_layers = placeholder(int)  # of seq2seq: the encoder's blocks; None: as many as layers
    model.encoder = "transformer"  # of seq2seq, what reads the source: transformer, rnn, gru or lstm
    model.decoder = "transformer"  # of seq2seq, what writes the target: the same; any goes with any encoder
    model.cell = "lstm"  # of arch recurrent: rnn, gru or lstm
    model.bidirectional = True  # of a recurrent encoder: it reads from both ends, with 2 x width columns
    model.attention = "additive"  # of a recurrent decoder in seq2seq: additive (Bahdanau's) or multiplicative (Luong's)
    model.start = placeholder(int)  # of seq2seq: id that a target begins with; None: the tokenizer's end
    model.forced_first = placeholder(int)  # of seq2seq: id that always comes next, as in BART; None: there is none
    model.heads = 4  # query heads per block
    model.kv_heads = placeholder(int)  # key/value heads, a divisor of heads; None: as many as heads
    model.head_width = placeholder(int)  # columns of a head; None: width / heads
    model.width = 128  # size of the residual stream
    model.mlp_width = placeholder(int)  # hidden size of the MLP; None: 4 x width, or 8/3 x width where it is gated
    model.context = 128  # the most tokens that a position can look back over, itself included
    model.vocabulary = placeholder(int)  # rows of the embedding; None: the tokenizer's size

    model.embedding_scale = 1.0  # embedded tokens times this; arXiv 1706.03762: sqrt(width)
    model.embedding_norm = False  # a norm of embedded tokens and positions, before the first block
    model.types = 0  # of an encoder: kinds of tokens, such as BERT's first and second sentence; 0: none are told apart
    model.positions = "learned"  # learned, sinusoidal, sinusoidal_halves, rotary, alibi, relative (T5's) or none
    model.relative = relative = ConfigDict()
    relative.buckets = 32  # of relative: how many kinds of distances there are
    relative.longest = 128  # of relative: tokens of distance from which on all are of one kind
    model.rotary = rotary = ConfigDict()
    rotary.theta = 10000.0  # the slowest rotation's wavelength is about 2 pi theta tokens
    rotary.scaling = "none"  # none, linear or llama3: how a context longer than the original one is reached
    rotary.factor = 8.0  # of linear and llama3: how many times longer
    rotary.low_frequency_factor = 1.0  # of llama3: waves that fit that often into original_context are stretched
    rotary.high_frequency_factor = 4.0  # of llama3: waves that fit that often are kept
    rotary.original_context = 8192  # of llama3: tokens of the context first trained on

    model.windows = (0,)  # tokens that a layer looks back over, itself included, layer by layer, repeated; 0: all
    model.attention_scale = placeholder(float)  # of query-key products; None: 1 / sqrt(head_width)
    model.qk_norm = False  # RMSNorm of each head's queries and keys
    model.value_residual = False  # each layer's values mixed with the first layer's, by a learned share
    model.norm = "layernorm"  # layernorm or rmsnorm
    model.norm_position = "pre"  # pre: x + f(norm(x)), and a norm before the head; post: norm(x + f(x))
    model.norm_epsilon = 1e-5  # added to the variance or mean square
    model.activation = "gelu_tanh"  # gelu, gelu_tanh, relu, relu2, silu; gated: swiglu, geglu, geglu_tanh
    model.mlp = "dense"  # dense, or experts: a mixture
    model.experts = 8  # MLPs of a mixture
    model.experts_per_token = 2  # how many of them a token goes through
    model.load_balance_loss = 0.01  # factor of the loss that is least when experts get equal shares
    model.router_z_loss = 0.001  # factor of the loss that keeps the router's logits small
    model.use_bias = False  # biases in linear layers and in layer norms
    model.qkv_bias = placeholder(bool)  # in the projections to queries, keys and values; None: as use_bias
    model.tied_head = True  # logits from the token embedding's own table
    model.head_bias = False  # a bias of each token's logit
    model.suppress_tokens = ()  # with head_bias: ids that are never decoded, such as Marian's padding
    model.head_transform = False  # of an encoder: one more layer, activation and norm before the head, as in BERT
    model.logit_scale = 1.0  # what the head reads times this; T5 with a tied head: width ** -0.5
    model.logit_softcap = 0.0  # logits are squashed to this times tanh(logits / this); 0: they are not
    model.mtp_depth = 0  # heads of a block each for the tokens after the next one, for train.objective=multi_token
    model.task = "none"  # a head besides: classification, tagging, span, choice, regression or embedding
    model.labels = 2  # of classification and tagging: how many there are
    model.pooling = "last"  # what stands for a whole text in a task head: first, last, mean, or BERT's pooler
    model.init_std = 0.02  # of embeddings and matrices at first; recurrent: of embeddings alone, and 0.1 serves better
    model.parametrization = "standard"  # mup: what is right at base_width stays right at any width (arXiv 2203.03466)
    model.base_width = placeholder(int)  # of mup: the width at which learning rates are found
    model.base_head_width = placeholder(int)  # of mup: the head_width there; the same one where heads are added
    model.base_layers = placeholder(int)  # the layers there; residual branches get sqrt(base_layers / layers); None: 1
    model.residual_init = "scaled"  # matrices that write to the residual stream: plain, scaled (1/sqrt(2L)) or zero
    model.dropout = 0.0  # fraction dropped from embeddings, attention weights and each residual branch

    model.scan_layers = False  # one compiled block run over stacked parameters: compiles faster, runs slower on CPU
    model.kernels = "auto"  # auto: by platform: cpu, gpu, tpu; plain: the formulas as they are, the others' reference
    model.remat = "none"  # what the backward pass computes again to save memory: none, dots (all but products), full

    config.data = data = ConfigDict()
    data.source = "stdlib"  # one of gptjax.data.sources.SOURCES: Python's own library, or, with data.path, "text"
    data.path = ""  # a file, a directory of .txt files, a glob, an http(s) address, or a set that prepare made
    data.mixture = ()  # instead of path: prepared sets and their weights, ((path, weight), ...); None: their tokens
    data.temperature = 1.0  # of a mixture: weights are raised to 1 / this; above 1 evens them out
    data.sha256 = ""  # of the file at an http(s) address, checked if given
    data.held_out = 0.05  # fraction kept for validation, by hash of a file's name; the tail where files are few
    data.tokenizer = "bpe:4096"  # bytes, chars, bpe:N (trained on the text), tiktoken's by name; a prepared set's own
    data.layout = "flat"  # rows as windows of one stream (flat), whole documents (packed), or one of them (examples);
    # of an encoder-decoder: prompts as sources and what follows them as targets (pairs)
    data.languages = ()  # of parallel text at data.path: source and target, such as ("en", "de"), as files are called
    data.columns = (0, 1)  # of one table without a header: which columns are source and target, from 0
    data.examples = examples = ConfigDict()  # of records with fields at data.path, .jsonl .json .csv .tsv .parquet, or
    # a directory of train, val (dev) and test: what a record is to the model
    examples.form = ""  # text, instructions (Alpaca's), chat; for a head: classes, values, choices, tags, spans
    examples.template = "{text}"  # what is read of a record, with its fields in braces
    examples.second = ""  # the same of a second text, read together with it; of spans: the text that has the answer
    examples.answer = "{label}"  # of text: what is learnt behind it, "": the template; of spans: what the answer says
    examples.label = "label"  # field of the class, value, tags or right choice; of spans: where the answer begins
    examples.labels = ()  # of classes and tags: their names in the data, model.labels of them, in the head's order
    examples.choices = "choices"  # field of choices' list
    examples.fields = ()  # names of columns, where a .csv or .tsv has no first line with them
    examples.chat_template = "plain"  # of chat: plain, chatml, llama3, or a file of one of Jinja's
    examples.too_long = "cut"  # examples longer than data.context: cut, leave_out or refuse; told with their number
    examples.balanced = False  # labels weigh the same together, however many texts each has
    examples.shots = 0  # so many examples of each label, or in all where there are none, to learn from; 0: all
    examples.shot_seed = 0  # by which they are drawn
    data.seed = placeholder(int)  # of the order of batches, and of what is drawn for them; None: the run's
    data.batch_size = 16  # sequences per optimizer step, over all devices
    data.context = placeholder(int)  # tokens per sequence, at most model.context; None: model.context
    data.augment = augment = ConfigDict()  # shares of training tokens, drawn anew each epoch (arXiv 1901.11196)
    augment.insert = 0.0  # that get a random token of the set behind them
    augment.delete = 0.0  # that are left out
    augment.swap = 0.0  # that change places with another one
    augment.replace = 0.0  # that become a random token of the set
    data.prefetch = 2  # batches made in threads ahead of the step; 0: each when it is wanted
    data.stages = ()  # before batch_size and context: ((steps, batch_size, context), ...), one after the other

    config.finetune = finetune = ConfigDict()  # with init_from: what of the model trains, and how
    finetune.method = "full"  # full, rule, top, bitfit, lora, dora, adalora, ia3, adapter, prefix, prompt
    finetune.rule = ""  # of rule: a regular expression; the parameters whose paths it matches train
    finetune.also = ""  # of every method: the same, of parameters that train besides
    finetune.top_layers = 2  # of top: how many of the last blocks train, with what is behind them
    finetune.targets = "."  # of lora, dora, adalora: a regular expression of modules that have a matrix
    finetune.rank = 8  # of lora and dora; of adalora: the mean of the ranks that are left at the end
    finetune.alpha = 16.0  # of lora, dora, adalora: what is added is multiplied with alpha / rank
    finetune.rank_stabilised = False  # with alpha / sqrt(rank) instead (rsLoRA)
    finetune.dropout = 0.0  # of lora, dora, adalora: fraction dropped from what the added product reads
    finetune.b_rate = 1.0  # of lora, dora: the second matrix's learning rate is that many times the first's (LoRA+)
    finetune.adalora = adalora = ConfigDict()
    adalora.first_rank = 12  # of each matrix, at first
    adalora.warmup_steps = 100  # before ranks are taken away
    adalora.final_steps = 200  # at the end, in which the ranks stay as they are
    adalora.every_steps = 10  # between two choices of ranks
    adalora.orthogonality = 0.1  # factor of the penalty that keeps P and Q orthogonal
    adalora.beta1 = 0.85  # decay of a number's mean sensitivity, per step
    adalora.beta2 = 0.85  # decay of its uncertainty, per step
    finetune.bottleneck = 16  # of adapter: columns between its two matrices
    finetune.parallel = False  # of adapter: beside a sublayer, not behind it
    finetune.quantise = "none"  # none, int8 or nf4: how the base's matrices that do not train are kept
    finetune.length = 16  # of prefix: keys and values before a text's own; of prompt: vectors before its tokens
    finetune.layer_decay = 1.0  # a block's learning rate is that many times the next one's; the tables' least of all
    finetune.rates = ()  # ((regular expression of paths, factor of the learning rate), ...), the first that matches
    finetune.unfreeze_every = 0  # steps after which one more block trains, from the last one down; 0: all at once
    finetune.l2_to_start = 0.0  # factor of half the squared distance to the first parameters, in the loss
    finetune.ewc = 0.0  # the same, each number's weighed by its Fisher information on the text of init_from's run
    finetune.fisher_rows = 256  # of ewc: rows of that text that it is estimated on, when the run begins

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"  # adamw, muon, lion, adafactor (reads no beta and no epsilon), sophia, schedule_free
    optimizer.learning_rate = 6e-3  # at the schedule's peak; adafactor: times the parameter's root mean square
    optimizer.weight_decay = 0.1  # per unit of learning rate, on matrices only
    optimizer.beta1 = 0.9  # decay of the gradient's running mean, per step; lion, schedule_free: the mean's share
    optimizer.beta2 = 0.95  # decay of its square's, per step; lion: of the gradient's; sophia: of the Hessian's
    optimizer.epsilon = 1e-8  # added to the root of the latter; sophia: the least denominator
    optimizer.momentum = 0.95  # of muon: decay of the running mean of a hidden matrix's gradient, per step
    optimizer.adam_learning_rate = placeholder(float)  # of muon: at the peak, off hidden matrices; None: the same
    optimizer.gamma = 0.01  # of sophia: factor of the Hessian in the denominator; the lower, the more is clipped
    optimizer.hessian_every_steps = 10  # of sophia: steps between estimates of the Hessian's diagonal
    optimizer.clip_norm = 1.0  # the gradient's largest global norm; 0: no clipping
    optimizer.ema = 0.0  # decay of a running mean of the parameters, which answers in their place, per step; 0: none

    config.schedule = schedule = ConfigDict()
    schedule.name = "cosine"  # cosine, linear, wsd (a trapezoid), inverse_sqrt or constant (as schedule_free wants)
    schedule.warmup_steps = 100  # steps from zero to the peak, linearly
    schedule.decay_steps = placeholder(int)  # step at which cosine, linear and wsd end their decay; None: the last
    schedule.final_fraction = 0.1  # of the peak, where that decay ends
    schedule.cooldown_fraction = 0.2  # of wsd: share of decay_steps, at their end, in which the rate goes down

    config.objective = objective = ConfigDict()  # options of the objectives that train.objective names
    objective.label_smoothing = 0.0  # share of a target's probability that all tokens, or labels, get in equal parts
    objective.z_loss = 0.0  # factor of log(sum(exp(logits)))^2 of each predicted token; arXiv 2204.02311: 1e-4
    objective.mask_rate = 0.15  # of masked and denoising: share of a text's tokens that are hidden; BART: 0.3
    objective.masking = "token"  # of masked: what is chosen as one: token, word or span (of one to ten words)
    objective.corruption = "spans"  # of denoising: spans (T5's, each a sentinel) or infilling (BART's, each a mask)
    objective.mean_span = 3.0  # of denoising: tokens of a span that is left out, on average
    objective.permute_sentences = False  # of infilling: the source's sentences come in another order
    objective.fim_rate = 0.5  # of fim: share of documents whose middle is put at their end
    objective.fim_spm = 0.5  # of fim: share of these in which the suffix comes first (SPM, not PSM)
    objective.temperature = 0.05  # of contrastive: divides cosines
    objective.teacher = ""  # of distillation: the directory of the run to learn from
    objective.teacher_temperature = 2.0  # of distillation: divides both models' logits
    objective.teacher_share = 0.5  # of distillation: the teacher's part of the loss; the text's own has the rest
    objective.adversarial = "none"  # the loss once more under shifted embeddings: none, fgm (one step) or pgd
    objective.epsilon = 1.0  # of fgm and pgd: length of a row's whole shift
    objective.adversarial_steps = 3  # of pgd: steps up the gradient, each of 2.5 epsilon / steps

    config.train = train = ConfigDict()
    train.objective = "causal"  # of gptjax.objectives.OBJECTIVES, or several: "masked + 0.5*next_sentence"
    train.steps = 1100  # optimizer steps
    train.grad_accumulation = 1  # slices of a batch whose gradients are added up before the optimizer's step
    train.hang_minutes = 30.0  # without progress, after which a process ends so that it is started again; 0: never
    train.dtype = "float32"  # of the arithmetic, float32 or bfloat16; parameters are float32 always

    config.mesh = mesh = ConfigDict()
    # How many devices divide what among them; one of these may be -1: all that the others leave.
    mesh.data = -1  # the rows of a batch
    mesh.fsdp = 1  # rows, and parameters, gradients and optimizer state, gathered layer by layer
    mesh.tensor = 1  # attention heads, columns of the MLP, words of the vocabulary
    mesh.context = 1  # the tokens of a sequence
    mesh.expert = 1  # rows, and the experts of a mixture

    config.eval = evaluation = ConfigDict()
    evaluation.every_steps = 110  # steps between looks at the held-out sample
    evaluation.batches = 8  # size of that fixed sample; the end of a run reads all held-out text

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 275  # steps between checkpoints; 0: not by steps; the last step is always saved
    checkpoint.every_minutes = 0.0  # the longest that a run goes without one; 0: not by time
    checkpoint.keep = 2  # newest checkpoints kept
    checkpoint.keep_every = 0  # steps between checkpoints that are made and kept for ever; 0: none
    checkpoint.keep_best = 0  # checkpoints kept with the least loss at eval.every_steps; 0: none for that

    config.guard = guard = ConfigDict()  # of bad steps: loss or gradient not finite, or a spike; they change nothing
    guard.spike_z = 0.0  # loss or gradient norm that many standard deviations above its mean is a spike; 0: none is
    guard.warmup_steps = 100  # steps that mean and deviation, of about 128 steps, have to hold before they judge one
    guard.patience = 5  # bad steps in a row after which a run goes back to a checkpoint, and the next time gives up

    config.log = log = ConfigDict()
    log.every_steps = 10  # steps between lines of metrics.jsonl
    log.statistics = 0  # steps between norms of parameters and updates, by group, in metrics.jsonl; 0: none
    log.writers = ()  # besides metrics.jsonl: "tensorboard", "wandb"
    log.profile_steps = ()  # first and last step, such as (10, 13), of a trace in the run's profile/; (): no trace

    config.sample = sample = ConfigDict()
    sample.prompt = "def read(self"  # what the sample at the end of a run goes on from
    sample.max_tokens = 200  # tokens
    sample.temperature = 0.8  # divides the logits; 0: the likeliest token always
    sample.top_k = 50  # draws among the k likeliest tokens; 0: among all
    return config
