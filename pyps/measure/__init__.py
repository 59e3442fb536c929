"""What speed and quality are, measured: bench, eval, doctor."""
