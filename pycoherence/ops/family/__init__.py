"""What the ops of a family share: `*_reduce`, `*_gram` and `*_order`, and those of convolutions."""
