"""Densities of small subgraphs, and a test whether a mask differs from a random one."""

from lightning_graphon.graphon.motifs.homogeneity import HomogeneityTest, homogeneity_test
from lightning_graphon.graphon.motifs.motifs import MotifDensities, motif_densities, path_density

__all__ = ["HomogeneityTest", "MotifDensities", "homogeneity_test", "motif_densities", "path_density"]
