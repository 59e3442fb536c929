"""From messages to the tokens of branches, synthesizer and text synthesis."""
