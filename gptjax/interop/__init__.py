"""Import from and export to Hugging Face formats: models, tokenizers and peft adapters."""
