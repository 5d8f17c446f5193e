"""Names that arguments of public functions take: one word has one meaning everywhere; `get_args` lists them."""

from typing import Literal, TypeAlias

# Step graphons: the order of rows and columns, the bins of neurons that two masks share, ties of equal degree,
# points at which a graphon is sampled.
Order: TypeAlias = Literal["degree", "spectral", "none"]
LayerOrder: TypeAlias = Literal[Order, "joint"]
Positions: TypeAlias = Literal["degree", "energy", "spectral"]
Ties: TypeAlias = Literal["average", "index"]
Points: TypeAlias = Literal["grid", "random"]
Counting: TypeAlias = Literal["distinct", "homomorphism"]
NullDistribution: TypeAlias = Literal["auto", "monte-carlo", "asymptotic"]
Relevance: TypeAlias = Literal["mean_difference", "correlation_ratio"]

# Kernels: how the infinite-width limit passes signals on, which kernel it returns, what its parameter term counts.
Propagate: TypeAlias = Literal["density", "energy", "drift"]
Parameterization: TypeAlias = Literal["standard", "ntk"]
Reduce: TypeAlias = Literal["mean", "per_output"]
Get: TypeAlias = Literal["ntk", "nngp"]
ParameterTerm: TypeAlias = Literal["kept", "all"]
BoundScale: TypeAlias = Literal["trace", "given"]
DesignForm: TypeAlias = Literal["block", "product"]
DesignTarget: TypeAlias = Literal["fit", "speed", "alignment", "energy"]

# Pruning: how the budget is spread over layers (N:M patterns are text of their own) and over rounds.
Allocation: TypeAlias = Literal["global", "uniform", "er", "erk"]
LimitAllocation: TypeAlias = Literal["global", "uniform"]
Schedule: TypeAlias = Literal["exponential", "linear"]
Rescore: TypeAlias = Literal["redrawn"]
Rescale: TypeAlias = Literal["unit", "layer"]
