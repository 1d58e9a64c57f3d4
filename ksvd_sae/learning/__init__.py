"""Dictionary learning: coders, atom updates, DB-KSVD. Needs only torch, numpy and safetensors."""
