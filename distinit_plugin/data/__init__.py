"""Records + decoding + sampling + views → batches."""
