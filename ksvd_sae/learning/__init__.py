"""Dictionary learning: coders, atom updates, DB-KSVD. Needs only torch, numpy, numba, triton and safetensors."""
