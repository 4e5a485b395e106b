"""Transforms inside other people's trainers: Lightning, Hugging Face Trainer and Accelerate.

The trainers are optional: each adapter asks for its own when it is first used and says in one line what to install.
Each module is imported by its own name, for example ``from pullback.adapters.lightning import transform_callback``.
"""
