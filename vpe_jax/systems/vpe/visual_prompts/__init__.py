"""Visual prompts as things to save, edit, rank and mix: one optional feature of VPE."""
