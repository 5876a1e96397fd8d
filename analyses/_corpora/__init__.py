"""What heads do over thousands of texts: streamed, resumed, merged from shards."""
