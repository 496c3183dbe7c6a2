"""Tokenizers: tiktoken's, trained ones and those of Hugging Face folders."""
