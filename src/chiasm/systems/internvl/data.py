"""The data node of the recipes of released models; it serves other systems too (`chiasm.train.meta_data`)."""

from chiasm.train.meta_data import HasLayout, MetaData, ModelLayout

__all__ = ["HasLayout", "MetaData", "ModelLayout"]
