"""Text to prepared token sets: reads documents, cleans, deduplicates, tokenizes and reports."""
