"""The kinds of dictionaries that a run can have.

A new kind is a file beside these with a subclass of ``Method`` (base.py), and its line here; see docs/add-a-kind.md.
"""

from ksvd_sae.methods.base import Method
from ksvd_sae.methods.controls import IdentityMethod, PCAMethod, RandomMethod
from ksvd_sae.methods.db_ksvd import DBKSVDMethod
from ksvd_sae.methods.finetuned import FinetunedMethod
from ksvd_sae.methods.linear_topk import LinearTopKMethod
from ksvd_sae.methods.published import PublishedSAEMethod
from ksvd_sae.methods.recoded import RecodedMethod
from ksvd_sae.methods.sae import (
    BatchTopKSAEMethod,
    JumpReLUSAEMethod,
    MatryoshkaBatchTopKSAEMethod,
    TopKSAEMethod,
)

METHODS: tuple[type[Method], ...] = (
    DBKSVDMethod,
    TopKSAEMethod,
    BatchTopKSAEMethod,
    MatryoshkaBatchTopKSAEMethod,
    JumpReLUSAEMethod,
    PublishedSAEMethod,
    PCAMethod,
    IdentityMethod,
    RandomMethod,
    RecodedMethod,
    LinearTopKMethod,
    FinetunedMethod,
)
