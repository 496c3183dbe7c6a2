"""Looking into a model: tables for notebooks, and what a train step costs."""
