"""Which node stands for which step; a new kind of layer is one line here."""

from lightning_graphon.ntk.infinite.nodes.affine import AffineNode
from lightning_graphon.ntk.infinite.nodes.attention import AttentionNode
from lightning_graphon.ntk.infinite.nodes.base import Node
from lightning_graphon.ntk.infinite.nodes.batch_norm import BatchNormNode
from lightning_graphon.ntk.infinite.nodes.drift_affine import DriftAffineNode
from lightning_graphon.ntk.infinite.nodes.embedding import EmbeddingNode
from lightning_graphon.ntk.infinite.nodes.joins import ConcatenationNode, ProductNode, SumNode
from lightning_graphon.ntk.infinite.nodes.linear_attention import LinearAttentionNode
from lightning_graphon.ntk.infinite.nodes.norms import NormNode
from lightning_graphon.ntk.infinite.nodes.pointwise import PointwiseNode
from lightning_graphon.ntk.infinite.nodes.source import InputNode, ParameterNode
from lightning_graphon.ntk.infinite.nodes.spatial import SpatialNode
from lightning_graphon.ntk.infinite.setting import Setting
from lightning_graphon.tracing.steps import (
    Affine,
    Attention,
    BatchNorm,
    Concatenation,
    Embedding,
    Input,
    LinearAttention,
    Norm,
    Parameter,
    Pointwise,
    Product,
    Spatial,
    Step,
    Sum,
)
from lightning_graphon.tracing.tracer import refusal

NODES: dict[type[Step], type[Node]] = {
    Input: InputNode,
    Parameter: ParameterNode,
    Affine: AffineNode,
    Pointwise: PointwiseNode,
    Spatial: SpatialNode,
    Sum: SumNode,
    Product: ProductNode,
    Concatenation: ConcatenationNode,
    Norm: NormNode,
    BatchNorm: BatchNormNode,
    Embedding: EmbeddingNode,
    Attention: AttentionNode,
    LinearAttention: LinearAttentionNode,
}


def build_nodes(setting: Setting) -> list[Node]:
    """A node for every step, in order.

    Raises:
        NotReadableError: A step has no node.
    """
    nodes: list[Node] = []
    kinds = NODES | ({Affine: DriftAffineNode} if setting.propagate == "drift" else {})
    for step in setting.trace.steps:
        if type(step) not in kinds:
            raise refusal(step.label)
        nodes.append(kinds[type(step)](step, [nodes[i] for i in step.inputs], setting))
    return nodes
