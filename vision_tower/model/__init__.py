"""ClipsModel: two stock towers and the captioner, and its losses."""
