"""The stages of curation, one file each; `data_pipelines.rows` holds what they exchange."""
