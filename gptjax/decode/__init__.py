"""Decoding: prompts and logits in, tokens and text out. Pure functions on the device, one batching engine on the host.

generate      checks requests and options, and runs the engine or a search
engine        continuous batching of requests on the host; step: many tokens per dispatch on the device
prompts       token ids of prompts and sources; prompt_files: prompts from files
prefill       prompts into key/value caches (gptjax.models.cache)
settings      sampling parameters; sampling, penalties, constraints, watermark: logits processors
ensemble      one distribution from several models, and classifier-free guidance
speculative   verifies drafted tokens; drafting: draft model and prompt lookup
beam          beam search; contrastive: contrastive search; batching: their batches of prompts
scoring       log-probabilities of given texts; fill_mask: predictions of an encoder for masked tokens
detokenize    tokens to text, up to a stop string; printer: output of `gptjax.generate`
"""
