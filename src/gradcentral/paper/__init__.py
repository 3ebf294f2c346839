"""The paper's statements and figures, measured on real networks.

Source: Yong, Huang, Hua and Zhang, Gradient Centralization, ECCV 2020, arXiv 2004.01461.
"""

from gradcentral.paper.draw import FIGURES, draw_all
from gradcentral.paper.hessian import Eigenvalue, hessian_matrix, hessian_vector_product, projected_norm, top_eigenvalue
from gradcentral.paper.initial_weights import centered_initialization, initial_means, initial_means_near_zero
from gradcentral.paper.measurement import Measurement
from gradcentral.paper.statements import measure_all
from gradcentral.paper.theorem_4_1 import hyperplane, intensity_responses, intensity_shift
from gradcentral.paper.theorem_4_2 import gradient_lipschitzness, loss_lipschitzness, projection_identities

__all__ = [
    "FIGURES",
    "Eigenvalue",
    "Measurement",
    "centered_initialization",
    "draw_all",
    "gradient_lipschitzness",
    "hessian_matrix",
    "hessian_vector_product",
    "hyperplane",
    "initial_means",
    "initial_means_near_zero",
    "intensity_responses",
    "intensity_shift",
    "loss_lipschitzness",
    "measure_all",
    "projected_norm",
    "projection_identities",
    "top_eigenvalue",
]
