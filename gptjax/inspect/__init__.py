"""For notebooks: looking into a model."""
