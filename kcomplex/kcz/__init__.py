"""The ``.kcz`` file: a checkpoint as what was measured."""
