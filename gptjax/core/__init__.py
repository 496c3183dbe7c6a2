"""Foundations of all other packages: console, files, arguments, random streams and the JAX runtime."""
