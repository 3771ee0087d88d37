"""Saving, editing, ranking and mixing visual prompts: an optional feature of VPE."""
