"""LEADRE: display-ad retrieval with a language model, as a nightly batch pipeline."""
