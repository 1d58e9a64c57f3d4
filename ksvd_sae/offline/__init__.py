"""A real small language model and real text that need no Hub: what the demo and the tests run on."""
