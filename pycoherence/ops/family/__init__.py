"""Parts that ops of a family share: `*_reduce`, `*_gram` and `*_order`, and convolutions."""
