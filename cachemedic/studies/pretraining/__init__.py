"""How the embedded bases were made.

From the bottom up:

initialisation  weights to start from, with copying heads
corpus          the training text as token ids
recipes         what each base is
train           the training
"""
