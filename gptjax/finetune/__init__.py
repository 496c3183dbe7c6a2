"""Fine-tuning: choice of the trainable parameters, parameter-efficient additions, and quantization of the frozen base.

All of it acts on a model from outside, by rules of parameter paths. methods: fine-tuning methods by name; attached:
additions to modules; prompts: prompt tuning; quantization: a frozen base in few bits; merging: several models into one;
fisher: the diagonal Fisher information; paths: trees by path. gptjax.optim.update_rules has the update rules, and
gptjax.runs.adapters the files.
"""
