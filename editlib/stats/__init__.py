"""Second moments of each layer's keys on ordinary text: computing, storing, finding and describing them."""
