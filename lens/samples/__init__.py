"""Short arbitrary inputs on which a model is opened."""
