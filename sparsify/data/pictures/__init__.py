"""Images as calibration data: a folder of them, and chats that hold them."""
