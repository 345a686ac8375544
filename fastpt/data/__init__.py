"""From rows in any shape to packed batches: sources -> formats -> render -> tokenised -> pack -> batches."""
