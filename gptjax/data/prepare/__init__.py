"""Prepares token sets from text: reads, cleans, deduplicates and tokenizes documents, and reports."""
