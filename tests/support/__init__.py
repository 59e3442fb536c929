"""What several tests use: tiny models, a model of the cache, the oracle, mutants."""
