"""From raw video files to shards: the demo set, and the curation pipeline on Ray."""
