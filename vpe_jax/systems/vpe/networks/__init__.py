"""Networks of VPE: the diffusion expert in its own sequence, and the source image of an edit."""
