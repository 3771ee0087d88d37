"""Networks of VPE: the renderer in a sequence of its own, and the source image of an edit."""
