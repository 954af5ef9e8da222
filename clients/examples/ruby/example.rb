# Recommendations, predictions and a chat from a ShopLM server, with deadlines, retries, a token and error details.
#
#   ruby -I. example.rb [customer id]      SHOPLM_ADDRESS and SHOPLM_TOKEN say where and as whom
require 'google/protobuf/well_known_types'
require 'google/rpc/error_details_pb'
require 'google/rpc/status_pb'
require 'grpc'
require 'grpc/health/v1/health_services_pb'
require 'shoplm/v1/chat_services_pb'
require 'shoplm/v1/model_services_pb'
require 'shoplm/v1/prediction_services_pb'
require 'shoplm/v1/recommendation_services_pb'

DETAILS = [Google::Rpc::ErrorInfo, Google::Rpc::BadRequest, Google::Rpc::RetryInfo].freeze

# What the google.rpc details of an error say.
def explain(error)
  puts "error: #{error.class.name.split('::').last} #{error.details}"
  packed = error.metadata['grpc-status-details-bin']
  (packed ? Google::Rpc::Status.decode(packed).details : []).each do |any|
    case detail = DETAILS.filter_map { |kind| any.unpack(kind) }.first
    when Google::Rpc::ErrorInfo then puts "reason: #{detail.reason}"
    when Google::Rpc::BadRequest
      detail.field_violations.each { |wrong| puts "wrong: #{wrong.field} #{wrong.description}" }
    when Google::Rpc::RetryInfo then puts "try again in: #{detail.retry_delay.to_f} s"
    end
  end
end

# The terms of a call: its deadline, which the server sees, and the token.
def terms(seconds)
  token = ENV['SHOPLM_TOKEN']
  { deadline: Time.now + seconds, metadata: token ? { 'authorization' => "Bearer #{token}" } : {} }
end

include Shoplm::V1
address = ENV.fetch('SHOPLM_ADDRESS', '127.0.0.1:50051')
retries = { 'grpc.service_config' => File.read(File.join(__dir__, '../service_config.json')) }
channel = GRPC::ClientStub.setup_channel(nil, address, :this_channel_is_insecure, retries)
stub = ->(service) { service.const_get(:Stub).new(address, :this_channel_is_insecure, channel_override: channel) }
recommendations, predictions, chats, models, health =
  [RecommendationService, PredictionService, ChatService, ModelService, Grpc::Health::V1::Health].map(&stub)

begin
  puts "health: #{health.check(Grpc::Health::V1::HealthCheckRequest.new, **terms(30)).status}"
  model = models.get_model(GetModelRequest.new, **terms(30))
  customer = Customer.new(customer_id: ARGV.fetch(0, model.demo_customer_ids[0]))

  answer = recommendations.recommend(RecommendRequest.new(customer: customer, count: 3), **terms(30))
  answer.items.each { |item| puts "item: #{item.item_id} #{item.title} #{item.score.round(2)}" }
  asked = PredictRequest.new(customer: customer, targets: model.targets.first(1))
  first = predictions.predict(asked, **terms(30)).predictions.first
  puts "prediction: #{first.target.kind} within #{first.target.horizon_days} days #{first.probability.round(3)}"

  question = [Message.new(role: 'user', content: 'What does delivery cost?')]
  print 'chat: '
  chats.chat(ChatRequest.new(customer: customer, messages: question, max_tokens: 32), **terms(60)).each do |event|
    print event.delta
    puts "\nended: #{event.summary.finish_reason}" if event.summary
  end

  question[0].content = 'Tell me everything about coffee.'
  call = chats.chat(ChatRequest.new(messages: question), return_op: true, **terms(60))
  begin
    call.execute.each { call.cancel } # the server stops computing within one step
  rescue GRPC::Cancelled
    puts 'cancelled: true'
  end

  recommendations.recommend(RecommendRequest.new(customer: customer, count: 1_000_000), **terms(30))
rescue GRPC::BadStatus => e
  explain(e)
end
