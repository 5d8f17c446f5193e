"""Densities of small graphs, and the test whether a mask can be told from a random one."""

from lightning_graphon.graphon.motifs.homogeneity import HomogeneityTest, homogeneity_test
from lightning_graphon.graphon.motifs.motifs import MotifDensities, motif_densities, path_density

__all__ = ["HomogeneityTest", "MotifDensities", "homogeneity_test", "motif_densities", "path_density"]
