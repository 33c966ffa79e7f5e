"""Our own models as OpenVINO graphs for the CPU (extra ``openvino``): weights, graphs, compiled parts, export."""
