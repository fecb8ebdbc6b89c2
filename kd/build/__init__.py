"""From a specification to models, data and engine; the only place that instantiates."""
