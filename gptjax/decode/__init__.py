"""Decoding: prompts and logits in, tokens and text out. Pure functions on the device, one engine of rows on the host.

generate      what can be asked for, checked, and given to the part that does it
engine        rows that requests wait for; step: the device's part, many tokens a dispatch
prompts       what a model is given: a prompt, or a source and the id that its own text begins with; prompt_files
reading       prompts into caches (gptjax.models.cache); scoring: log-probabilities of given text
settings      what each row asks for; penalties, sampling: what that does to logits; watermark; constraints
speakers      several models, or a guided one, as one
speculative   tokens proposed (proposals) and judged
beam          search, as contrastive; rows: their prompts side by side
filling       an encoder's: what stands behind masks
stopping      tokens to text, up to a stop string; chat: dialogues to prompts
"""
