"""Every tolerance of the tests, each with its reason.

Unless a comment says otherwise, a tolerance on a vector or an error is a fraction of the norm of the
sample (or batch) that it belongs to.
"""

import torch

# --- Coders against the reference -----------------------------------------------------------------
# Products that follow a step through the Gram matrix, against products taken from the residual: the
# rounding of some 4k steps, each about eps = 1.2e-7 (float32) or 2.2e-16 (float64), times a margin of 100.
CODE_ERROR = {torch.float32: 2e-4, torch.float64: 1e-10}
# Coefficients solve a k × k system, so rounding is multiplied by its condition number: up to about 1e3 for
# the random supports used here.
COEFFICIENT = {torch.float32: 5e-3, torch.float64: 1e-8}
# ‖r‖² is followed by subtraction from ‖x‖²: below √eps·‖x‖ it is rounding, and a coder may stop.
SOLVED = {torch.float32: 1e-3, torch.float64: 1e-7}
# Two atoms at distance t of each other: the coefficients grow like 1/t, the error of the sample does not.
# OMP leaves out an atom closer than 4·sqrt(eps) to the span of the others and gives up that much error.
DEPENDENT_ATOM = {torch.float32: 1.5e-3, torch.float64: 1e-7}
# One near tie in a thousand choices may fall the other way in float32.
SUPPORT_AGREEMENT_FLOAT32 = 0.99

# --- Weighting ------------------------------------------------------------------------------------------
# float32 maps and products; inverses multiply rounding by condition numbers of 1e2 to 1e3.
MAP_AND_BACK = 1e-4

# --- Invariants of a code ---------------------------------------------------------------------------
# ⟨residual, atom⟩ for atoms in the support after least squares: rounding times the condition number.
ORTHOGONAL = {torch.float32: 1e-4, torch.float64: 1e-10}
# A quantity that must not rise may rise by the rounding of the sums that measure it.
RISE = {torch.float32: 1e-5, torch.float64: 1e-12}
# Another chunk size makes BLAS add in another order.
CHUNKING = {torch.float32: 1e-4, torch.float64: 1e-12}
# Permuting or flipping atoms makes BLAS add in another order; float64 only.
EQUIVARIANCE = 1e-10

# --- Atom updates ---------------------------------------------------------------------------------
# Same, eigenvectors of a Gram matrix against an SVD of the matrix itself: half the digits of float64 at worst.
EXACT_UPDATE_FLOAT64 = 1e-7
# Norms of float32 rows are rounded once a component: sqrt(D)·eps, with a margin.
UNIT_NORM = {torch.float32: 2e-6, torch.float64: 1e-12}
# Σ‖residual‖² by an update, which keeps its residual up to date, against the same from scratch; as a fraction
# of Σ‖x‖².
UPDATE_ERROR = {torch.float32: 1e-5, torch.float64: 1e-12}
# At a fixed point the residual is rounding, eps, and a step divides it by the coefficients (about 1).
FIXED_POINT = {torch.float32: 1e-5, torch.float64: 1e-12}
# Sums over samples in another order; an eigenvector amplifies the rounding by 1 / (its relative gap).
SAMPLE_ORDER = {torch.float32: 1e-3, torch.float64: 1e-9}
# Of what an update takes off the error, lost where codes and residual are rounded to bfloat16 (1e-4 measured).
ROUNDED_SUMS = 1e-3
# Held-out error after 10 batches by either update from the same random atoms: 0.2 to 3.9 % apart on three data sets.
SWEEP_AGAINST_EXACT = 0.08
# The naive parallel update multiplies the error of these cases at least by this (100 to 8e5 measured).
BLOW_UP = 50.0

# --- FVU ----------------------------------------------------------------------------------------------
# Sums of some thousand numbers in float64 in another order, the variance as Σx² − (Σx)²/n, Σx² up to 1e3 of it.
SUMMED_IN_FLOAT64 = 1e-12
# The same with a mean of up to 1e4 times the spread: Σx² is up to 1e8 of the variance.
FAR_FROM_THE_MEAN = 1e-7

# --- DB-KSVD ----------------------------------------------------------------------------------------
# FVU in the log, float32 samples, against float64 from scratch.
LOGGED_FVU = 1e-5
# Error of each sweep against the float64 reference: float32 atoms drift apart as sweeps go on.
SWEEP_ERROR = 1e-3
# An atom counts as found when its |cosine| with a planted one is at least this: 8 degrees, far above what a
# random atom reaches in 64 dimensions (about 0.45 over 128 atoms).
FOUND_COSINE = 0.99
# Share found of 128 atoms in 64 dimensions, k = 3: 1.0 for 13 of 20 seeds, 0.977 (three missing) for the worst.
FOUND_SHARE = 0.96
# Share found with all 20,000 samples in one batch, 16 passes: 0.95 to 0.98 for five seeds; 0.83 to 0.84 if no atom is
# ever replaced.
FOUND_SHARE_LARGE_BATCH = 0.9
# Share found of 1,024 atoms in 256 dimensions, k = 20, 60 passes: 0.959 to 0.966 for five seeds.
FOUND_SHARE_SYNTHETIC = 0.9
# FVU of the problem above: 0.0012 with all atoms, 0.0078 with three missing; noise alone is 0.0009.
FOUND_FVU = 0.012
# Share found of 30 atoms in 20 dimensions, k = 2, exact update, 5 passes over 2,000 samples: 0.9 or 1.0 for six
# runs. A random dictionary, and the initial one, find none.
FOUND_SHARE_SMALL = 0.86

# --- PCA ------------------------------------------------------------------------------------------
# float32 rows against scikit-learn's float64 SVD, 1 − |cosine|.
PCA_COSINE = 1e-6
PCA_ORTHONORMAL = 1e-6
# Share of variance kept, float32 components.
PCA_VARIANCE = 1e-6

# --- The package ------------------------------------------------------------------------------------
# `import ksvd_sae` must feel like nothing: it reads two small files.
IMPORT_SECONDS = 0.5

# --- SAEs, splicing and scores -----------------------------------------------------------------------
# The SAE divides rows that have unit norm to rounding (UNIT_NORM) by their norms; a code has a few of them.
SAE_CODE = 1e-5
# Weighted atoms are rebuilt from unit raw rows: rounding times the map's condition number.
WEIGHTED_CODE = 1e-3
# bfloat16 keeps 8 bits: a number is off by up to 1/256, a sum of k of them by a few times that.
BFLOAT16 = 1 / 32
# Logits and losses of the tiny model: float32 sums in another order, through two layers.
SPLICED_LOSS = 1e-4
# The same latents' scores averaged in float32 by SAEBench, and by hand.
SAME_SCORE = 1e-5
# Metrics summed in float64 from float32 reconstructions that batches of other sizes round differently.
HELDOUT_METRIC = 1e-5
# An SAE folded from weighted space into raw space, weights rounded to float32 (6e-8), the map's condition number 1e2;
# as a fraction of the distance from the centre.
FOLDED_SAE = 1e-4
# Sixty steps of training by the same products in another order, as a fraction of the FVU: near ties fall the other way.
SPARSE_TRAINING = 2e-2
# A step's loss and gradients, as a fraction of the largest gradient: float32 sums in another order.
SPARSE_STEP = 1e-4
# Core's losses and metrics from shared runs: the same float32 sums in chunks and in another order.
SHARED_CORE = {"rtol": 1e-5, "atol": 1e-5}
# Weights after ten steps of Adam, as a fraction of the way they went: it divides a gradient by its size, so where a
# gradient is rounding the steps differ by as much as they are long.
SPARSE_PARAMETERS = 1e-2
# SAEBench's scores, from the same activations: shares of words, which rounding cannot move by less than one word.
SAEBENCH_SCORE = 1e-5
# Codes of an orthonormal basis rebuild a float32 sample to rounding: squared, 1e-14, with room for the mean.
PERFECT_FVU = 1e-9

# --- Activations ------------------------------------------------------------------------------------
# TransformerLens against transformers: nine blocks of float32 sums in another order, as a fraction of the
# largest activation (7e-7 measured).
HOOK_AGAINST_TRANSFORMERS = 1e-5
# The same blocks of transformers' in float32, but for how many there are behind.
SAME_FORWARD_PASS = {"rtol": 1e-5, "atol": 1e-5}
# A score of float32 sums against one of float64 sums.
FLOAT32_SCORE = {"rel": 1e-4, "abs": 1e-6}
# float64 sums in another order, as a fraction of the statistic.
STREAMED_STATISTICS = 1e-10
# Gradients by two orders of the same sums, through up to ten blocks, as a fraction of the largest gradient (1e-8 and
# 8e-16 measured).
GRADIENT = {torch.float32: 1e-5, torch.float64: 1e-12}
# A central difference of step h = 1e-5 in float64: h² times the third derivative, and the loss (100 nats) times
# eps / h, 1e-9, for slopes of 0.04 and more (2e-8 measured).
FINITE_DIFFERENCE = 1e-6
# Gradients of float32 codes against those of float64 ones, as a fraction of all gradients: rounding times the condition
# number of a support (4e-7 measured), and where steps converge, those after the last that float32 sees (5e-5).
GRADIENT_FLOAT32 = 5e-4
# A central difference of a loss of 3 in float32 with a step of 0.02, as a fraction of the gradient's length: rounding
# and the curvature (5e-3 measured).
LATENT_SLOPE = 0.02
# bfloat16 through a block and the logits, forward and backward: some ten roundings of 1/256 (0.03 measured).
GRADIENT_BFLOAT16 = 0.1

# --- Benchmarks -------------------------------------------------------------------------------------
# FVU of other implementations of the same greedy picks: near ties in float32 and float64 may fall the other way.
PEER_FVU = 2e-3
# Two implementations of K-SVD, float32 and float64, atom after atom in the same order.
PEER_UPDATE_FVU = 1e-3
# The memory meter: an array of this many MiB is seen to within what the interpreter takes beside it.
TEMPORARY_MIB, RSS_MIB = 64, 8

# --- Several processes ------------------------------------------------------------------------------
# Sums over samples in parts are rounded otherwise, 1e-7 of them; each batch codes with what the one before it learned,
# and where two atoms tie for a sample, the sample takes the other. 1 − cos grows with the square of the turn.
RANKS_COSINE = 1e-6
RANKS_FVU = 1e-4
# Of scores of whole runs: a pick that a tie decides otherwise is one of a few hundred.
RANKS_SCORE = 1e-2
