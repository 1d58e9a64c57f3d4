"""What every test needs before it starts."""

from hypothesis import settings

# derandomize: the same examples on every run, so a red test stays red until the code changes.
settings.register_profile("ksvd_sae", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("ksvd_sae")
