"""Fused operators of masked video modelling: Triton on a GPU, plain PyTorch elsewhere.

    tube_mask, random_mask            which tokens are hidden: index tensors, drawn on the device
    gather_tubes                      the visible tokens of a uint8 or float clip, normalised
    masked_pixel_loss                 VideoMAE's and MAE's loss, straight from the clip
    masked_frame_difference_loss      the same for motion
    frame_difference                  the motion target itself
    linear_cross_entropy              classifier head and cross-entropy without the logits
    active_path                       which implementation runs for a tensor or a device
    costs                             bytes and operations of each, from shapes

Needs torch; Triton only on a GPU.
"""

# In a checkout's root this folder can also be imported as `kernels`; transformers does so, looking for a package of
# that name. Registering the operators a second time would free those that are in use.
if __name__ == "mam2.kernels":
    from . import costs
    from .frame_difference import frame_difference
    from .gather_tubes import gather_tubes
    from .launch import active_path
    from .linear_cross_entropy import linear_cross_entropy
    from .masked_loss import masked_frame_difference_loss, masked_pixel_loss
    from .masks import TubeMask, random_mask, tube_mask

    __all__ = [
        "TubeMask",
        "active_path",
        "costs",
        "frame_difference",
        "gather_tubes",
        "linear_cross_entropy",
        "masked_frame_difference_loss",
        "masked_pixel_loss",
        "random_mask",
        "tube_mask",
    ]
