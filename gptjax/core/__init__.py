"""What every other package stands on: console, files, arguments, random streams and the JAX runtime."""
