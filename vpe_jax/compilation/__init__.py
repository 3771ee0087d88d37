"""What a program needs and what bounds it, from compiling it for machines that needn't be there."""
