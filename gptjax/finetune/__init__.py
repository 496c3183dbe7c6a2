"""Fine-tuning: what of a model trains, what small parameters are added to it, and what is kept of that.

Decided from outside the model, by rules of paths. methods: the ways, by name; attached: what additions do to modules;
updates: what is done to an optimizer's updates; quantised: a frozen base in few bits; adapters: what was tuned as a
folder of its own. Nothing here trains.
"""
