"""From a name or a folder to a `HookedModel`."""
