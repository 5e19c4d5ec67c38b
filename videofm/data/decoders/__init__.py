"""One file a video decoder library; `videofm.data.decode` chooses among them."""
