"""Training and serving must agree on what is written here, once.

The trainer calls the very functions that the service calls, so a vector made while training is the vector made
while serving. Nothing here imports torch, transformers or FastAPI.
"""
